"""Parity at export: golden cases, random-input cases, bisection of drift."""
