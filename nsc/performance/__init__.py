"""What a merge costs: predicted from shapes, and measured."""
