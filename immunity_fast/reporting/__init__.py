"""What a person looks at: figures, tables and the one HTML file that holds them."""
