"""nnU-Net (Isensee et al., 2021), the original program as an external engine, in the protocol of the other methods.

A manifest is written as a dataset of nnU-Net, nnU-Net plans and trains on our split, and its masks are scored by our
evaluation. A run folder holds what every run folder holds, but in place of the checkpoints ``nnunet/`` (data, plans,
weights, predictions) and ``nnunet.log``.

Source:
    Isensee et al., nnU-Net: a self-configuring method for deep learning-based biomedical image segmentation, 2021.
"""
