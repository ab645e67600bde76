"""The driver and cycle model of the systolic-array accelerator will live here."""
