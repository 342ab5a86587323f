"""Clinical reports of many sentences: what they state now, and the short sentence that a model was trained on."""
