"""Mixtures of terms of low rank."""
