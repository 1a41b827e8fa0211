"""What a model costs and what a machine gives: parameters, FLOPs, peak rates, memory."""
