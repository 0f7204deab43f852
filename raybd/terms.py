"""Names of the loss terms, for what has a column of each and does not need the study's model for it."""

# In the order of their columns; `study.LossWeights` has a weight of each.
TERMS = ("mmcl", "ssl", "image_ssl", "text_ssl", "nt_xent", "siglip", "siglip_mean")
