"""Data sets that metabloom can federate: one file each, found by discovery."""
