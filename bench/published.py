"""How many tokens a round do the papers report? For simulated acceptance, never for measurements.

Greedy, MT-bench, LLaMA2-chat 7B where there is a figure for it, else Vicuna 7B; the bonus included.
"""

PUBLISHED: dict[str, tuple[float, str]] = {
    "plain": (1.0, "by definition"),
    "eagle_chain": (3.00, "EAGLE, arXiv 2401.15077, table 5, LLaMA2-chat 7B"),
    "eagle_tree": (3.62, "EAGLE, arXiv 2401.15077, table 1, LLaMA2-chat 7B"),
    "eagle2": (4.70, "EAGLE-2, arXiv 2406.16858, table 1, LLaMA2-chat 7B"),
    "eagle3": (6.13, "EAGLE-3, arXiv 2503.01840, table 1, LLaMA-3.1 8B: none for LLaMA2"),
    "medusa": (2.52, "EAGLE-2, arXiv 2406.16858, table 1, Vicuna 7B"),
    "lookup": (1.43, "EAGLE-2, arXiv 2406.16858, table 1, LLaMA2-chat 7B (PLD)"),
    "lookahead": (1.66, "EAGLE-2, arXiv 2406.16858, table 1, LLaMA2-chat 7B"),
    "standalone": (2.36, "EAGLE-2, arXiv 2406.16858, table 1, Vicuna 7B (SpS)"),
}
