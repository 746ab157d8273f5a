"""A model of transitions between states of cells, on the frozen latent of a trained model.

In the order of a fit: `transitions` finds which population becomes which, and matches cells; `actions` makes vectors of
what was done; `futures` tells how many ways cells go; `linear` is where every prediction starts, which `network`
corrects, as `training` teaches it; `fitting` puts these together. `decoder` goes back to expression. `model` is what
users call. `planning` searches sequences of actions, which `fast` carries out one by one and `slow` several at once;
`plan` is what comes of it. `stored` keeps everything in files.
"""
