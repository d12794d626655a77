"""Pyro models as plain functions: their log-density, their sites, their runs under many draws."""
