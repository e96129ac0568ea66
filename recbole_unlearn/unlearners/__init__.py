"""Ways to forget (`replay`, `reoptimise`, `influence`), and the problems that they solve (`dot_product`: BPR;
`propagated`: LightGCN; `any_loss`: every other model). `choose` says which way goes with which problem; `guard` whether
a log tells its training.
"""
