"""The tables of McMahan et al. 2017, arXiv:1602.05629: the paper's numbers, and ours beside them."""
