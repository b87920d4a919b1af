# SPDX-License-Identifier: Apache-2.0
"""The forms that ``reward-model export`` writes."""

from typing import Literal

Form = Literal["hf", "hf4", "dschat", "sentence-transformers", "openrlhf"]
