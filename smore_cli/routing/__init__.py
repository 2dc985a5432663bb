"""Collecting and showing what routers do."""
