# SPDX-License-Identifier: Apache-2.0
"""Model states by formula alone, for models and clusters that nobody here can run, as a Markdown table.

python -m reward_model.planning.on_paper
"""

from __future__ import annotations

from reward_model.planning.plan import GIB

# Models on paper: name, Ψ, and the parameters of the largest module (DeepSpeed's "largest layer"). Shapes as LLaMA's:
ON_PAPER = (
    ("7 B", 7e9, 32_000 * 4_096),  # 32 layers of 4,096; the embedding
    ("70 B", 70e9, 32_000 * 8_192),  # 80 layers of 8,192; the embedding
    ("400 B", 400e9, 128_256 * 16_384),  # 126 layers of 16,384; the embedding
)
ROOM = 0.25  # of a GPU's memory, left to activations
HOST = 2048  # GiB of a node beyond which offload goes to NVMe


def scale_table(sizes=(8, 64, 512, 1024), memory: float = 80) -> str:
    """Model states of a GPU by DeepSpeed's formulas (half precision, AdamW, all parameters trained), in Markdown.

    4Ψ + 16Ψ/N (stage 2), 2Ψ (with offload), 4L + 18Ψ/N (stage 3), 4L + 2Ψ/N (optimizer in host memory), 4L (parameters
    too), L: the largest layer. Sent: 2·2Ψ, 3·2Ψ; between nodes by ZeRO++ 1½·2Ψ, with 4-bit gradients (qgZ) ¾·2Ψ. GiB.
    """
    lines = [
        "| Ψ | GPUs | stage 2 | 2 + CPU | stage 3 | 3 + CPU, optimizer | 3 + CPU, both | host of a node, both "
        "| sent: stage 2 | stage 3 | ZeRO++ | with qgZ | choose |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, total, largest in ON_PAPER:
        for n in sizes:
            sharded = 4 * largest + 18 * total / n
            held = (4 * total + 16 * total / n, 2 * total, sharded, 4 * largest + 2 * total / n, 4 * largest)
            host = 18 * total / n * 8
            limit = (1 - ROOM) * memory * GIB
            order = (("2", held[0]), ("3", held[2]), ("2 + CPU", held[1]), ("3 + CPU", held[4]))
            choice = next(setting for setting, size in order if size <= limit)
            if choice.endswith("CPU") and host > HOST * GIB:
                choice = "3 + NVMe"
            sent = (4 * total, 6 * total, 3 * total, 1.5 * total)
            cells = [
                f"{size / GIB:,.0f}" if size >= 9.95 * GIB else f"{size / GIB:.1f}" for size in (*held, host, *sent)
            ]
            lines.append(f"| {name} | {n:,} | {' | '.join(cells)} | {choice} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(scale_table())
