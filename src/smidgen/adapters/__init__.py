"""Adapters: small modules that stand around the calls of a frozen model's modules. Torch only."""
