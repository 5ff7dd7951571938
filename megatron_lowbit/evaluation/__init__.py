"""What a spec costs in accuracy, before it is used: predictions with compressed partial sums against exact ones."""
