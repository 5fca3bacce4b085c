"""What is refused or warned of: recipes, weights, and texts that say too little."""
