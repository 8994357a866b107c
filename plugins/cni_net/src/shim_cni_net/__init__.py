"""Pod networking by CNI plugins: network namespaces, the CNI protocol, and records that no address outlives."""
