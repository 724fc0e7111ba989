"""The data of a training: annotated clips of all datasets, mixed, augmented and turned into batches."""
