//! The bag-of-words format of the UCI Machine Learning Repository: `docword.NAME.txt` and `vocab.NAME.txt`, each
//! plain or gzip.
//!
//! ```text
//! D                      number of documents
//! W                      number of words
//! N                      number of lines that follow
//! document word count    each numbered from 1
//! ```
//!
//! The vocabulary has a word in each line, in order.

use std::{
    fs::File,
    path::{Path, PathBuf},
};

use super::{Corpus, MAX_TOKENS};
use crate::data::{DataError, lines::Lines};

/// Reads the file at `path`, with its vocabulary at `vocabulary` or, if none is named, beside it.
///
/// # Errors
/// A file is missing or does not keep to the format.
pub fn read(path: &Path, vocabulary: Option<&Path>) -> Result<Corpus, DataError> {
    let name = path.display().to_string();
    let words = match vocabulary {
        Some(words) => words.to_owned(),
        None => beside(path)?,
    };
    let vocabulary = words_of(&words)?;
    let mut lines = Lines::new(&name, open(path)?)?;
    parse(&mut lines, vocabulary, &words)?.check(&name)
}

fn open(path: &Path) -> Result<File, DataError> {
    File::open(path).map_err(|reason| DataError::Read { path: path.display().to_string(), reason })
}

/// `vocab.NAME.txt` for `docword.NAME.txt`, plain or gzip.
fn beside(path: &Path) -> Result<PathBuf, DataError> {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let base = name.strip_suffix(".gz").unwrap_or(&name);
    let cure = "name its vocabulary with --vocabulary";
    let content = |reason: String| DataError::Content { path: path.display().to_string(), reason };
    let Some(rest) = base.strip_prefix("docword.") else {
        return Err(content(format!("its name is not docword.NAME.txt: {cure}")));
    };
    let plain = path.with_file_name(format!("vocab.{rest}"));
    let packed = path.with_file_name(format!("vocab.{rest}.gz"));
    [&plain, &packed]
        .into_iter()
        .find(|path| path.is_file())
        .cloned()
        .ok_or_else(|| content(format!("there is no {} beside it: {cure}", plain.display())))
}

fn words_of(path: &Path) -> Result<Vec<String>, DataError> {
    let name = path.display().to_string();
    let mut lines = Lines::new(&name, open(path)?)?;
    let mut words = Vec::new();
    while lines.advance()? {
        let word = lines.text()?;
        if word.is_empty() {
            return Err(lines.error("a word is missing"));
        }
        words.push(word.to_owned());
    }
    Ok(words)
}

/// Reads the documents; errors call the vocabulary `path`.
fn parse(lines: &mut Lines<'_>, vocabulary: Vec<String>, path: &Path) -> Result<Corpus, DataError> {
    let mut head = [0; 3];
    for (value, what) in head.iter_mut().zip(["documents", "words", "lines"]) {
        if !lines.advance_to_data()? {
            return Err(lines.whole(format!("it ends before the number of {what}: {FORMAT}")));
        }
        *value = number(lines, lines.text()?, &format!("the number of {what}"))
            .map_err(|_| lines.error(format!("this is not the number of {what}: {FORMAT}")))?;
    }
    let [documents, words, count] = head;
    if words != vocabulary.len() as u64 {
        return Err(DataError::Content {
            path: path.display().to_string(),
            reason: format!("it has {} words, and the documents are of {words}", vocabulary.len()),
        });
    }
    let mut found: Vec<(u32, u32, u32)> = Vec::new();
    let (mut tokens, mut read) = (0, 0);
    while lines.advance_to_data()? {
        let [document, word, times] = triple(lines)?;
        for (what, value, most) in [("document", document, documents), ("word", word, words)] {
            if value == 0 || value > most {
                return Err(lines.error(format!("{what} {value} is not one of 1 to {most}")));
            }
        }
        tokens += times;
        if times == 0 || tokens > MAX_TOKENS as u64 {
            return Err(lines.error(format!("a count is from 1 to {MAX_TOKENS}, all together")));
        }
        // Each is at most what `number` lets through.
        found.push((document as u32 - 1, word as u32 - 1, times as u32));
        read += 1;
    }
    if read != count {
        return Err(lines.whole(format!("{count} lines were promised, and {read} are there")));
    }
    found.sort_by_key(|&(document, ..)| document);
    let mut corpus =
        Corpus::new(format!("{} (UCI bag of words, {})", lines.name(), lines.packing), vocabulary);
    for document in found.chunk_by(|a, b| a.0 == b.0) {
        corpus.push(document.iter().flat_map(|&(_, word, times)| (0..times).map(move |_| word)));
    }
    Ok(corpus)
}

const FORMAT: &str =
    "a UCI bag of words begins with the numbers of documents, words and lines, each in a line of its own";

/// A number that fits 32 bits.
fn number(lines: &Lines<'_>, text: &str, what: &str) -> Result<u64, DataError> {
    let number = text
        .parse::<u32>()
        .map_err(|_| lines.error(format!("{what} `{text}` is not a number from 0 to {}", u32::MAX)))?;
    Ok(number.into())
}

fn triple(lines: &Lines<'_>) -> Result<[u64; 3], DataError> {
    let fields: Vec<&str> = lines.text()?.split_ascii_whitespace().collect();
    let [document, word, count] = fields[..] else {
        return Err(lines.error(format!("it has {} fields, not `document word count`", fields.len())));
    };
    Ok([
        number(lines, document, "the document")?,
        number(lines, word, "the word")?,
        number(lines, count, "the count")?,
    ])
}

/// The documents of `text`, over this vocabulary.
#[cfg(test)]
pub fn read_from(text: &str, vocabulary: &[&str]) -> Result<Corpus, DataError> {
    let vocabulary = vocabulary.iter().map(|&word| word.to_owned()).collect();
    parse(&mut Lines::new("docword.txt", text.as_bytes())?, vocabulary, Path::new("vocab.txt"))
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use flate2::{Compression, write::GzEncoder};
    use proptest::{collection::vec, prelude::*};

    use super::*;

    proptest! {
        /// Whatever the counts, and in whatever order they come, the tokens are those that were written.
        #[test]
        fn what_was_written_is_read(mut counts in vec((1u32..20, 1u32..30, 1u32..5), 1..80)) {
            let lines: String = counts.iter().map(|(d, w, n)| format!("{d} {w} {n}\n")).collect();
            let corpus = parsed(format!("20\n30\n{}\n{lines}", counts.len()).as_bytes(), 30).unwrap();
            counts.sort_by_key(|&(document, ..)| document);
            let written: Vec<u32> =
                counts.iter().flat_map(|&(_, word, times)| (0..times).map(move |_| word - 1)).collect();
            prop_assert_eq!(&corpus.tokens, &written);
            counts.dedup_by_key(|&mut (document, ..)| document);
            prop_assert_eq!(corpus.documents(), counts.len());
        }

        /// Nonsense is refused, and never more than refused.
        #[test]
        fn any_change_of_a_byte_is_read_or_refused(place in 0usize..28, byte: u8) {
            let mut text = b"3\n4\n4\n3 4 1\n1 2 2\n3 1 1\n1 1 1\n".to_vec();
            text[place] = byte;
            if let Ok(corpus) = parsed(&text, 4) {
                prop_assert!((0..corpus.documents()).all(|d| corpus.document(d).iter().all(|&w| w < 4)));
            }
        }
    }

    fn parsed(text: &[u8], words: usize) -> Result<Corpus, DataError> {
        let vocabulary = (0..words).map(|i| format!("w{i}")).collect();
        parse(&mut Lines::new("docword.t.txt", text)?, vocabulary, Path::new("vocab.t.txt"))
    }

    #[test]
    fn documents_come_as_they_are_plain_and_packed() {
        let text = b"3\n4\n4\n3 4 1\n1 2 2\r\n3 1 1\n1 1 1\n";
        let corpus = parsed(text, 4).unwrap();
        // The second document has no words.
        assert_eq!((corpus.documents(), corpus.tokens()), (2, 5));
        assert_eq!((corpus.document(0), corpus.document(1)), (&[1, 1, 0][..], &[3, 0][..]));
        let mut packed = GzEncoder::new(Vec::new(), Compression::fast());
        packed.write_all(text).unwrap();
        let unpacked = parsed(&packed.finish().unwrap(), 4).unwrap();
        assert_eq!(unpacked.tokens, corpus.tokens);
        assert!(unpacked.source.contains("gzip"), "{}", unpacked.source);
    }

    #[test]
    fn what_is_wrong_is_shown_with_its_line() {
        for (text, message) in [
            ("", "ends before the number of documents"),
            ("3\n4\n", "ends before the number of lines"),
            ("many\n4\n1\n1 1 1\n", "docword.t.txt:1: this is not the number of documents"),
            ("3\n4\n1\n1 5 1\n", "docword.t.txt:4: word 5 is not one of 1 to 4; the line is `1 5 1`"),
            ("3\n4\n1\n0 1 1\n", "document 0 is not one of 1 to 3"),
            ("3\n4\n1\n4 1 1\n", "document 4 is not one of 1 to 3"),
            ("3\n4\n1\n1 1 0\n", "a count is from 1"),
            ("3\n4\n1\n1 1 x\n", "the count `x` is not a number"),
            ("3\n4\n1\n1 1\n", "it has 2 fields"),
            ("3\n4\n2\n1 1 1\n", "2 lines were promised, and 1 are there"),
            ("3\n5\n1\n1 1 1\n", "vocab.t.txt: it has 4 words, and the documents are of 5"),
            ("3\n4\n2\n1 1 2147483647\n1 2 1\n", "docword.t.txt:5: a count is from 1 to 2147483647"),
        ] {
            let error = parsed(text.as_bytes(), 4).unwrap_err().to_string();
            assert!(error.contains(message), "{text:?}: {error}");
        }
    }
}
