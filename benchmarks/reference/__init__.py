"""The yardstick: the language-guided baseline (Ariadne), written in the plain way from its description.

Float32, eager, the text encoder run in every step, MONAI's dictionary transforms for every case, nothing kept between
epochs. It computes the same function as the presets ``ariadne`` (``tests/test_conversion.py``).
"""
