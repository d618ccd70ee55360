//! Reading ratings from a file, plain or gzip.
//!
//! The format is recognised by what the file contains, never by its name. What is not recognised, or does not
//! keep to the format that its beginning promised, is an error that shows the line.
//!
//! | format | how it is recognised |
//! |---|---|
//! | MovieLens | the header `userId,movieId,rating`, mostly with `,timestamp` |
//! | MatrixMarket | `%%MatrixMarket matrix coordinate` with `real` or `integer`, `general` or `symmetric` |
//! | triples | lines of `row column value` and maybe a timestamp, separated by spaces, a tab, a comma or `::` |
//!
//! MatrixMarket's indices are positions. The ids of the two others are names: they are numbered in the order
//! of their first appearance.

use std::{collections::HashMap, fs::File, io::Read, path::Path};

use super::{DataError, Rating, Ratings, lines::Lines};

const RECOGNISED: &str = "recognised are MovieLens CSV with the header `userId,movieId,rating,timestamp`, \
    MatrixMarket (`%%MatrixMarket matrix coordinate real general`), and lines of `row column value [timestamp]` \
    separated by spaces, a tab, a comma or `::`; each plain or as gzip";

/// Reads the file at `path`.
///
/// # Errors
/// When it cannot be read, is of no known format, has a line that does not fit its format, or no ratings.
pub fn file(path: &Path) -> Result<Ratings, DataError> {
    let name = path.display().to_string();
    let file = File::open(path).map_err(|reason| DataError::Read { path: name.clone(), reason })?;
    read(&name, file)
}

/// Reads ratings from `input`; errors call it `name`.
///
/// # Errors
/// As [`file()`].
pub fn read(name: &str, input: impl Read) -> Result<Ratings, DataError> {
    ratings(Lines::new(name, input)?)
}

fn ratings(mut lines: Lines<'_>) -> Result<Ratings, DataError> {
    if !lines.advance()? {
        return Err(lines.whole(format!("the file is empty; {RECOGNISED}")));
    }
    let first = String::from_utf8_lossy(&lines.bytes).trim().to_ascii_lowercase();
    let ratings = if first.starts_with("%%matrixmarket") {
        matrix_market(lines, &first)?
    } else if let "userid,movieid,rating" | "userid,movieid,rating,timestamp" = first.as_str() {
        let fields = first.split(',').count();
        if !lines.advance_to_data()? {
            return Err(lines.whole("there is nothing after the header"));
        }
        triples(lines, "MovieLens", Separator::Text(","), fields)?
    } else {
        let comment = first.is_empty() || first.starts_with(['#', '%']);
        if comment && !lines.advance_to_data()? {
            return Err(lines.whole(format!("there is nothing but comments; {RECOGNISED}")));
        }
        let (separator, fields) = recognise_triple(&lines)?;
        triples(lines, "triples", separator, fields)?
    };
    Ok(ratings)
}

/// What stands between the fields of a line.
#[derive(Debug, Clone, Copy)]
enum Separator {
    Text(&'static str),
    Blanks,
}

impl Separator {
    /// The fields of a line and how many there are; of more than 4, the first 4.
    fn fields(self, line: &str) -> ([&str; 4], usize) {
        let mut fields = [""; 4];
        let mut count = 0;
        let mut put = |field| {
            if let Some(place) = fields.get_mut(count) {
                *place = field;
            }
            count += 1;
        };
        match self {
            Separator::Text(text) => line.split(text).for_each(|field| put(field.trim())),
            Separator::Blanks => line.split_ascii_whitespace().for_each(put),
        }
        (fields, count)
    }

    fn name(self) -> &'static str {
        match self {
            Separator::Text(text) => text,
            Separator::Blanks => "blanks",
        }
    }
}

/// The separator and number of fields of the current line, if it is a triple.
fn recognise_triple(lines: &Lines<'_>) -> Result<(Separator, usize), DataError> {
    let unknown = || lines.error(format!("the format is not recognised; {RECOGNISED}"));
    let text = std::str::from_utf8(&lines.bytes).map_err(|_| unknown())?.trim();
    let separator = ["::", ","].into_iter().find(|separator| text.contains(separator));
    let separator = separator.map_or(Separator::Blanks, Separator::Text);
    let (fields, count) = separator.fields(text);
    let numbers = fields[..2].iter().all(|id| id.parse::<u64>().is_ok()) && fields[2].parse::<f32>().is_ok();
    if matches!(count, 3 | 4) && numbers { Ok((separator, count)) } else { Err(unknown()) }
}

/// Numbers ids in the order of their first appearance.
#[derive(Default)]
struct Ids(HashMap<u64, u32>);

impl Ids {
    /// The number of `id`, or none if there is no `u32` left for it.
    fn number(&mut self, id: u64) -> Option<u32> {
        let next = u32::try_from(self.0.len()).ok().filter(|&next| next < u32::MAX)?;
        Some(*self.0.entry(id).or_insert(next))
    }
}

/// Reads triples from the current line to the end.
fn triples(
    mut lines: Lines<'_>,
    format: &str,
    separator: Separator,
    expected: usize,
) -> Result<Ratings, DataError> {
    let (mut rows, mut columns) = (Ids::default(), Ids::default());
    let mut entries = Vec::new();
    loop {
        let (fields, count) = separator.fields(lines.text()?);
        if count != expected {
            let separator = separator.name();
            let reason =
                format!("it has {count} fields, not {expected} separated by {separator} as those before");
            return Err(lines.error(reason));
        }
        let ids = (id(&lines, "row", fields[0])?, id(&lines, "column", fields[1])?);
        let value = value(&lines, fields[2])?;
        let numbers = rows.number(ids.0).zip(columns.number(ids.1));
        let Some((row, column)) = numbers else {
            return Err(lines.error("the file has more than 2^32 - 2 different ids"));
        };
        entries.push(Rating { row, column, value });
        if !lines.advance_to_data()? {
            break;
        }
    }
    let source = format!("{} ({format}, {})", lines.name(), lines.packing);
    Ok(Ratings { source, rows: rows.0.len() as u32, columns: columns.0.len() as u32, entries })
}

fn id(lines: &Lines<'_>, what: &str, field: &str) -> Result<u64, DataError> {
    field.parse().map_err(|_| lines.error(format!("the {what} id `{field}` is not a whole number")))
}

fn value(lines: &Lines<'_>, field: &str) -> Result<f32, DataError> {
    match field.parse::<f32>() {
        Ok(value) if value.is_finite() => Ok(value),
        Ok(_) => Err(lines.error(format!("the value `{field}` is not finite"))),
        Err(_) => Err(lines.error(format!("the value `{field}` is not a number"))),
    }
}

/// Reads a MatrixMarket file whose first line, in lower case, is `banner`.
fn matrix_market(mut lines: Lines<'_>, banner: &str) -> Result<Ratings, DataError> {
    let words: Vec<&str> = banner.split_ascii_whitespace().collect();
    let symmetric = match words[..] {
        ["%%matrixmarket", "matrix", "coordinate", "real" | "integer" | "double", symmetry] => match symmetry
        {
            "general" => false,
            "symmetric" => true,
            _ => {
                return Err(
                    lines.error(format!("symmetry `{symmetry}` is not known: general or symmetric is"))
                );
            }
        },
        _ => {
            let reason = "of MatrixMarket, `matrix coordinate` with `real` or `integer` values is understood";
            return Err(lines.error(reason));
        }
    };
    if !lines.advance_to_data()? {
        return Err(lines.whole("the line with the size, `rows columns entries`, is missing"));
    }
    let size = lines.text()?.split_ascii_whitespace().map(str::parse::<u32>).collect::<Result<Vec<_>, _>>();
    let Ok([rows, columns, promised]) = size.as_deref() else {
        return Err(lines.error("the size is not `rows columns entries`, each below 2^32"));
    };
    let (rows, columns, promised) = (*rows, *columns, *promised);
    if symmetric && rows != columns {
        return Err(lines.error("a symmetric matrix has as many rows as columns"));
    }
    let mut entries = Vec::new();
    let mut found = 0;
    while lines.advance_to_data()? {
        found += 1;
        if found > promised {
            return Err(lines.error(format!("the file promises {promised} entries, and this is one more")));
        }
        let (fields, count) = Separator::Blanks.fields(lines.text()?);
        if count != 3 {
            return Err(lines.error(format!("it has {count} fields, not `row column value`")));
        }
        let row = index(&lines, "row", fields[0], rows)?;
        let column = index(&lines, "column", fields[1], columns)?;
        let value = value(&lines, fields[2])?;
        entries.push(Rating { row, column, value });
        if symmetric && row != column {
            entries.push(Rating { row: column, column: row, value });
        }
    }
    if found < promised {
        return Err(
            lines.whole(format!("the file promises {promised} entries, but has {found}: is it cut off?"))
        );
    }
    if entries.is_empty() {
        return Err(lines.whole("the matrix has no entries"));
    }
    let source = format!("{} (MatrixMarket, {})", lines.name(), lines.packing);
    Ok(Ratings { source, rows, columns, entries })
}

fn index(lines: &Lines<'_>, what: &str, field: &str, size: u32) -> Result<u32, DataError> {
    match field.parse::<u32>() {
        Ok(index) if (1..=size).contains(&index) => Ok(index - 1),
        _ => Err(lines.error(format!("the {what} `{field}` is not a number from 1 to {size}"))),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn parse(text: &str) -> Result<Ratings, DataError> {
        read("test", text.as_bytes())
    }

    fn entries(text: &str) -> Vec<(u32, u32, f32)> {
        parse(text).unwrap().entries.iter().map(|e| (e.row, e.column, e.value)).collect()
    }

    fn gzip(text: &str) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(text.as_bytes()).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn movielens() {
        let text =
            "userId,movieId,rating,timestamp\r\n1,307,3.5,1256677221\r\n1,481,3.5,1\r\n7,307,0.5,2\r\n";
        let ratings = parse(text).unwrap();
        assert_eq!(ratings.source, "test (MovieLens, plain)");
        assert_eq!((ratings.rows, ratings.columns), (2, 2));
        assert_eq!(entries(text), [(0, 0, 3.5), (0, 1, 3.5), (1, 0, 0.5)]);
        assert_eq!(entries("\u{feff}userid,movieId,rating\n1,2,3"), [(0, 0, 3.0)]);
    }

    #[test]
    fn triples_with_every_separator() {
        for line in
            ["5 900 1.5\n5 7 2", "5\t900\t1.5\n5\t7\t2\n", "5,900,1.5\n5, 7, 2", "5::900::1.5\n5::7::2\n\n"]
        {
            assert_eq!(entries(line), [(0, 0, 1.5), (0, 1, 2.0)], "{line}");
        }
        assert_eq!(entries("196\t242\t3\t881250949\n"), [(0, 0, 3.0)]);
        assert_eq!(entries("# made by hand\n\n 1   1\t-1e2\n"), [(0, 0, -100.0)]);
    }

    #[test]
    fn matrix_market_keeps_its_size() {
        let text = "%%MatrixMarket matrix coordinate integer general\n% hello\n4 5 2\n1 5 7\n\n4 1 -3\n";
        let ratings = parse(text).unwrap();
        assert_eq!((ratings.rows, ratings.columns), (4, 5));
        assert_eq!(entries(text), [(0, 4, 7.0), (3, 0, -3.0)]);
        let symmetric = "%%MatrixMarket matrix coordinate real symmetric\n3 3 2\n2 1 7\n3 3 1\n";
        assert_eq!(entries(symmetric), [(1, 0, 7.0), (0, 1, 7.0), (2, 2, 1.0)]);
    }

    #[test]
    fn gzip_is_recognised_by_content_and_in_several_members() {
        let mut packed = gzip("1 2 3\n");
        packed.extend(gzip("1 4 5\n"));
        let ratings = read("test.txt", packed.as_slice()).unwrap();
        assert_eq!(ratings.source, "test.txt (triples, gzip)");
        assert_eq!(ratings.entries.len(), 2);
    }

    #[test]
    fn a_bad_line_is_shown_with_its_number() {
        let movielens = "userId,movieId,rating,timestamp\n1,2,3,4\n";
        let market = "%%MatrixMarket matrix coordinate real general\n2 2 2\n";
        for (text, line, content, reason) in [
            (format!("{movielens}1,2,good,5\n"), 3, "1,2,good,5", "the value `good` is not a number"),
            (format!("{movielens}1,2,nan,5"), 3, "1,2,nan,5", "the value `nan` is not finite"),
            (format!("{movielens}1,2\n"), 3, "1,2", "it has 2 fields, not 4 separated by ,"),
            (format!("{movielens}\n-1,2,3,4"), 4, "-1,2,3,4", "the row id `-1` is not a whole number"),
            ("1 2 3\n1 x 3\n".into(), 2, "1 x 3", "the column id `x`"),
            ("1 2 3\n1 2 3 4\n".into(), 2, "1 2 3 4", "it has 4 fields, not 3 separated by blanks"),
            (format!("{market}3 1 1\n"), 3, "3 1 1", "the row `3` is not a number from 1 to 2"),
            (format!("{market}1 0 1\n"), 3, "1 0 1", "the column `0` is not a number from 1 to 2"),
            (format!("{market}1 1\n"), 3, "1 1", "not `row column value`"),
            (format!("{market}1 1 1\n1 1 1\n1 1 1\n"), 5, "1 1 1", "promises 2 entries"),
            ("%%MatrixMarket matrix array real general\n1 1\n1".into(), 1, "array", "`matrix coordinate`"),
            (
                "%%MatrixMarket matrix coordinate pattern general\n".into(),
                1,
                "pattern",
                "`real` or `integer`",
            ),
            (
                "%%MatrixMarket matrix coordinate real hermitian\n".into(),
                1,
                "hermitian",
                "general or symmetric",
            ),
            (
                "%%MatrixMarket matrix coordinate real general\n1 2\n".into(),
                2,
                "1 2",
                "`rows columns entries`",
            ),
        ] {
            let error = parse(&text).unwrap_err();
            assert!(matches!(error, DataError::Line { line: l, .. } if l == line), "{text:?}: {error}");
            let message = error.to_string();
            assert!(message.starts_with(&format!("test:{line}: ")), "{message}");
            assert!(message.contains(content) && message.contains(reason), "{message}");
        }
    }

    #[test]
    fn an_unknown_format_is_refused_with_those_that_are_known() {
        for text in [
            "",
            "# nothing\n",
            "hello world\n",
            "user,item,rating\n1,2,3\n",
            "1,2,3,4,5\n",
            "{}\n",
            "1 2\n",
            "\0\u{1}",
        ] {
            let message = parse(text).unwrap_err().to_string();
            for format in ["MovieLens", "MatrixMarket", "row column value", "gzip"] {
                assert!(message.contains(format), "{text:?}: {message}");
            }
        }
        let message = read("test", &b"\xff\xfe\x00"[..]).unwrap_err().to_string();
        assert!(message.contains("not recognised"), "{message}");
    }

    #[test]
    fn a_file_that_is_cut_off_is_refused() {
        let message =
            parse("%%MatrixMarket matrix coordinate real general\n2 2 2\n1 1 1\n").unwrap_err().to_string();
        assert!(message.contains("promises 2 entries, but has 1"), "{message}");
        let packed = gzip("1 2 3\n1 2 3\n");
        let error = read("test", &packed[..packed.len() - 9]).unwrap_err();
        assert!(matches!(error, DataError::Read { .. }), "{error}");
        let error = file(Path::new("/nonexistent/ratings.csv")).unwrap_err().to_string();
        assert!(error.starts_with("/nonexistent/ratings.csv: "), "{error}");
    }

    #[test]
    fn a_long_line_is_shortened() {
        let message = parse(&format!("1 2 3\n{}\n", "9".repeat(500))).unwrap_err().to_string();
        assert!(message.contains('…') && message.len() < 250, "{message}");
    }
}
