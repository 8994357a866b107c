"""Pod networking by CNI plugins."""
