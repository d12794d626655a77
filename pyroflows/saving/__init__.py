"""Flows and guides as folders of one readable description and one file of tensors; no pickle."""
