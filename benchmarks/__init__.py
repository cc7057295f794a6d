"""How fast orchestra is, beside what Redis itself can do on the same machine in the same minute: see README.md."""
