"""What of a compression outlives its process, and what a killed run resumes from: blocks, findings and the plan."""
