"""Speed, measured as ratios inside one run; `docs/benchmarks.md` says what each figure means."""
