"""Measurements that print a table each: speed, memory and quality beside what they are held to."""
