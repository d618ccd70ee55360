//! The page: self-contained HTML, with the paper's claims beside what was found.

use std::fmt::Write as _;

use super::section::Section;
use crate::report::TextTable;

/// What the page says before the experiments.
#[derive(Debug)]
pub struct Preface {
    /// Where and how it was made.
    pub machine: String,
    /// Parameters of the model: name and value.
    pub parameters: Vec<(String, String)>,
}

const STYLE: &str = "body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}\
h1,h2{line-height:1.2}h2{margin-top:3rem;border-top:1px solid #ccc;padding-top:1.5rem}\
blockquote{margin:1rem 0;padding:.5rem 1rem;border-left:4px solid #0072b2;background:#f3f7fa}\
figure{margin:1rem 0}figure svg{max-width:100%;height:auto;border:1px solid #e3e3e3}figcaption{color:#555;font-size:.9rem}\
table{border-collapse:collapse;font-size:.9rem;margin:1rem 0;display:block;overflow-x:auto}\
th,td{border-bottom:1px solid #e3e3e3;padding:.2rem .7rem;text-align:right}th:first-child,td:first-child{text-align:left}\
.claims{list-style:none;padding:0}.claims li{margin:.7rem 0;padding-left:8.5rem;position:relative}\
.verdict{position:absolute;left:0;font-weight:600;font-size:.85rem;padding:.1rem .5rem;border-radius:.3rem;color:#fff}\
.yes{background:#007a5a}.no{background:#b84600}.found{color:#555;font-size:.9rem;display:block}";

/// Text for HTML.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// The whole page.
pub fn page(preface: &Preface, sections: &[Section]) -> String {
    let mut page = String::new();
    let claims = || sections.iter().flat_map(|section| &section.claims);
    let (all, held) = (claims().count(), claims().filter(|claim| claim.holds).count());
    let mut put = |text: &str| {
        page.push_str(text);
        page.push('\n');
    };
    put("<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">");
    put(
        "<meta name=\"viewport\" content=\"width=device-width\"><title>The paper's experiments, on Fervor</title>",
    );
    put(&format!("<style>{STYLE}</style></head><body>"));
    put("<h1>The paper's experiments, on Fervor</h1>");
    put(
        "<p>Dai et al., <i>High-Performance Distributed ML at Scale through Parameter Server Consistency Models</i> (AAAI 2015, \
         <a href=\"https://arxiv.org/abs/1410.8043\">arXiv 1410.8043</a>): what it claims, and what Fervor's server and client do, \
         as they are, on a simulated cluster. The arithmetic of the training is real; time is that of a model of the network \
         and of the machines, whose parameters are below. What a claim says here is decided by the numbers of this run.</p>",
    );
    put(&format!(
        "<p><b>{held} of {all} claims are supported by this run.</b> {}</p>",
        escape(&preface.machine)
    ));
    put("<table>");
    for (name, value) in &preface.parameters {
        put(&format!("<tr><td>{}</td><td>{}</td></tr>", escape(name), escape(value)));
    }
    put("</table>");
    for (number, section) in sections.iter().enumerate() {
        put(&one(number + 1, section));
    }
    put("</body></html>");
    page
}

fn one(number: usize, section: &Section) -> String {
    let mut text = String::new();
    let mut put = |line: String| {
        text.push_str(&line);
        text.push('\n');
    };
    put(format!("<h2>{number}. {}</h2>", escape(section.title)));
    put(format!("<blockquote><b>The paper:</b> {}</blockquote>", escape(section.paper)));
    put(format!("<p>{}</p>", escape(&section.setup)));
    put("<ul class=\"claims\">".into());
    for claim in &section.claims {
        let (class, verdict) = if claim.holds { ("yes", "supported") } else { ("no", "not supported") };
        put(format!(
            "<li><span class=\"verdict {class}\">{verdict}</span>{}<span class=\"found\">{}</span></li>",
            escape(&claim.claim),
            escape(&claim.found)
        ));
    }
    put("</ul>".into());
    for figure in &section.figures {
        // An SVG inside HTML has no XML declaration.
        let svg = figure.svg.find("<svg").map_or("", |at| &figure.svg[at..]);
        put(format!("<figure>{svg}<figcaption>{}</figcaption></figure>", escape(&figure.title)));
    }
    for remark in &section.remarks {
        put(format!("<p>{}</p>", escape(remark)));
    }
    put(table(&section.table));
    text
}

fn table(table: &TextTable) -> String {
    let mut text = String::from("<table>");
    for (number, row) in table.rows().iter().enumerate() {
        let cell = if number == 0 { "th" } else { "td" };
        text.push_str("<tr>");
        for value in row {
            let _ = write!(text, "<{cell}>{}</{cell}>", escape(value));
        }
        text.push_str("</tr>\n");
    }
    text + "</table>"
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::{super::claims::Claim, *};

    #[test]
    fn a_claim_that_did_not_come_out_is_said_to() {
        let mut table = TextTable::new(["a", "b"]);
        table.row(["1 < 2", "3"]);
        let section = |holds| Section {
            title: "Title",
            paper: "It is so.",
            setup: String::new(),
            figures: vec![],
            table: table.clone(),
            claims: vec![Claim::new("a < b", "they are", holds)],
            remarks: vec!["A remark.".into()],
            data: Value::Null,
        };
        let preface = Preface { machine: "here".into(), parameters: vec![("nodes".into(), "64".into())] };
        let page = page(&preface, &[section(true), section(false)]);
        assert!(page.contains("1 of 2 claims are supported"));
        assert!(page.contains("verdict yes\">supported") && page.contains("verdict no\">not supported"));
        assert!(
            page.contains("<td>1 &lt; 2</td>") && page.contains("a &lt; b") && page.contains("A remark.")
        );
        assert!(!page.contains("src=") && !page.contains("<link"), "self-contained");
    }
}
