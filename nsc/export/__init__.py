"""Writing a merge: factors, files, proof, record and report."""
