"""What the example scripts share: their command line, data, networks, training, plots and output files."""
