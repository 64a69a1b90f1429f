"""fomoe.io: bytes only. Rings, read threads, aligned memory, and a probe of the drive."""
