"""What a model knows: exams, contamination, a judge. Imports common/, model/, data/ and inference/."""
