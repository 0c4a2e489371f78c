"""Recipes of several methods, methods with gates, and side networks."""
