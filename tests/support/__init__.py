"""What several test modules share: runs, models, references and servers."""
