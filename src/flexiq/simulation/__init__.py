"""Discrete-event simulation of a fleet from measured latency curves will live here."""
