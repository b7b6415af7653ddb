"""Unlabeled and labelled rows: reading, sampling, packing, and what each modality takes."""
