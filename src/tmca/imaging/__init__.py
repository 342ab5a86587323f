"""Files to upright arrays and back, with their geometry.

:mod:`tmca.imaging.reading` reads files of every kind; ``raster`` knows pictures, ``nifti`` volumes, ``dicom`` DICOM.
"""
