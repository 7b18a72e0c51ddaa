"""The paper's synthetic tasks (arXiv 2510.26692, section 5.1): KDA beside two other mixers."""
