"""The search of the `dynquant` encoder on a CPU, in compiled loops; `tiles` is the way in."""
