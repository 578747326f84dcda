"""What `immunity_fast.reproduce` is made of: which runs, the queue that does them, tables, charts, Figure 2."""
