"""The C++ engine for x86 and Arm processors will live here; it imports without torch."""
