"""The Transformer and its cache: plain functions over a nested dict of arrays.

Flax's machinery and the two weight layouts (stacked for training, one subtree per layer for
decoding) do not leave this folder.
"""
