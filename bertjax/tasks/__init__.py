"""What people do with BERT's heads: texts in, answers out."""
