"""What a run leaves behind: JSON, figures, tables on the terminal. Files appear whole or not at all."""
