"""The measurements: cases, timing, records and what is drawn of them, on a clock and records that are made up."""
