# SPDX-License-Identifier: Apache-2.0
"""Stable reward-model training for DeepSpeed-Chat."""

__version__ = "0.1.0"
