"""Programs that measure distclip and what it replaces; run each as `python -m benchmarks.NAME`."""
