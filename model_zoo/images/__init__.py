"""Data sets: named sets, folders, npz and parquet files, as float images in [0, 1] with labels."""
