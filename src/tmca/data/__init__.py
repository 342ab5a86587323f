"""Datasets: records of image, mask and sentence, where they come from, and how they become batches."""
