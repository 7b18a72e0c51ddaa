"""What the paper says of speed: arXiv 2510.26692, figures 1b, 7a and 7b, read off the drawings.

The model has 48 B parameters and 27 layers, `all_mla` is the one with every layer MLA. The paper
states neither the GPU, nor how many, nor the engine, nor the batches of figure 1b. Of figure 7a
what is below 0.2 s is known to 0.05 s.
"""

SOURCE = "arXiv 2510.26692, figures 1b, 7a and 7b: 48 B, 27 layers; GPU and engine not stated"
LENGTHS = tuple(2**n for n in range(12, 21))

Series = dict[str, tuple[float, ...]]  # provider -> ms at each of LENGTHS

PREFILL: Series = {  # of a prompt
    "ours": (100, 130, 190, 330, 640, 1400, 3220, 8070, 22800),
    "all_mla": (60, 100, 180, 360, 790, 2010, 5760, 18600, 65500),
}
DECODE: Series = {  # of a token at batch 1
    "ours": (5.09, 5.12, 5.37, 5.41, 5.53, 5.74, 6.00, 6.66, 7.99),
    "all_mla": (5.32, 5.37, 6.20, 6.52, 6.88, 7.67, 9.10, 11.96, 17.76),
}
LARGEST_BATCH: Series = {  # of a token at the largest batch
    "ours": (0.10, 0.09, 0.09, 0.10, 0.15, 0.46, 0.65, 1.05, 1.84),
    "all_mla": (0.09, 0.13, 0.21, 0.40, 0.78, 1.83, 3.10, 5.88, 11.48),
}
