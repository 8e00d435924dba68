"""What a model knows: exams, scored questions, contamination, a judge. Imports common/, model/, data/ and inference/."""
